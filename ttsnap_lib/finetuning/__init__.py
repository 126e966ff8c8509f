"""Noise-aware rewards by curriculum self-distillation (arXiv 2511.22242, section 3)."""
