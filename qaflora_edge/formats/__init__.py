"""Files and texts that may come from anywhere, read with every field checked and sizes bounded."""
