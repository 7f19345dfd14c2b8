"""Cross-tokenizer distillation by Contextual Dynamic Mapping. No Ray in here; see docs/architecture.md."""

__version__ = "0.1.0"
