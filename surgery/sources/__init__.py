"""Sources: where bytes are. Local files and memory today; the Hub will be the only importer of ``huggingface_hub``."""
