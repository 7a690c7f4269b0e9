"""Files and texts that may come from anywhere, read with every field checked and sizes bounded."""

from qaflora_edge.imports import defer

defer("gguf")  # its writers and vocabularies take 25 ms
