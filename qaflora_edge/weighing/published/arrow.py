"""The strategy `arrow`: the direction that an adapter amplifies most."""

from qaflora_edge.weighing.published.spectr import Spectral
from qaflora_edge.weighing.strategy import Measured


class Arrow(Spectral):
    """Weigh by |v . x|, v the top right-singular vector of B A (Arrow, arXiv 2405.11157)."""

    name = "arrow"
    is_baseline = True
    help = "by how much of the query lies in the direction that each adapter amplifies most"
    routing = "arrow"
    measured = Measured("along its direction")


STRATEGIES = (Arrow(),)
