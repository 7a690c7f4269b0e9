"""`python -m qaflora_edge` is `qaflora`."""

from qaflora_edge.cli import main

main(prog_name="qaflora")
