"""A strategy that drafts: the surest adapter drafts, and the base writes with the draft in view.

python examples/own_relay.py run demo "What is the extension of the Cork shop?" --strategy surest
"""

from qaflora_edge import DraftStep, Plan, Strategy, WriteStep, register_strategy
from qaflora_edge.cli import main

SURE = -0.5  # nats of a draft's least sure token


class Surest(Strategy):
    name = "surest"
    help = "the surest adapter drafts, and the base writes with the draft in view"
    drafts = True
    is_base_prefilled = True

    def plan(self, reading):
        query = reading.query
        nobody = [[0.0] * query.n_layer for _ in query.adapters]  # [n_adapter, n_layer]
        if not query.can_draft:
            return nobody
        drafts = reading.drafts(query.adapters, 8)
        least = {draft.adapter: min(draft.logprobs, default=SURE) for draft in drafts}
        best = max(drafts, key=lambda draft: least[draft.adapter])
        if least[best.adapter] <= SURE:
            return nobody
        drafting = DraftStep(best.adapter, begun=best)
        writing = WriteStep(nobody, view="before")
        return Plan((drafting, writing), because=f"{best.adapter} drafts.")


register_strategy(Surest())
main()
