"""qaflora's command line with a strategy of its own, qa-flora's weights made sharper:

python examples/own_strategy.py run demo "Name a fruit." --strategy sharper
"""

from qaflora_edge import Plan, Strategy, register_strategy
from qaflora_edge.cli import main


class Sharper(Strategy):
    name = "sharper"

    def plan(self, reading):
        divergence = reading.divergence()  # [n_adapter, n_layer], in nats
        power = (divergence + 1e-30) ** 2  # 1/k where no adapter moves a layer
        return Plan.mix(power / power.sum(axis=0), divergence)


register_strategy(Sharper())
main()
