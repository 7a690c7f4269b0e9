"""The strategy `spectr`: sizes at projections, in one pass of the base."""

from qaflora_edge.weighing.plan import Plan
from qaflora_edge.weighing.strategy import ADDED, KINDS, Reading, Strategy


class SpectR(Strategy):
    """Weigh by the mean over tokens and modules of softmax over the adapters of |scale B A x|.

    x is the base's input of q, k and v. SpectR (arXiv 2504.03454) mixes at each token, we once an
    answer.
    """

    name = "spectr"
    help = "by the size of what each adapter adds to the attention's projections"
    measured = ADDED
    compares = KINDS

    def plan(self, reading: Reading) -> Plan:
        from qaflora_edge.weighing.published.projections import AttentionInputs

        weights, sizes = reading.listen(AttentionInputs)
        return Plan.mix(weights, sizes)


STRATEGIES = (SpectR(),)
