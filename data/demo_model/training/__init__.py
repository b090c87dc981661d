"""Everything that makes the demo model: texts, generators, tokenizer, trainer, export, evaluation.

Run from the repository's root as `python -m data.demo_model.training.STEP`; README.md has the
steps in order. Not part of the flashmoe_lab package, and imported by none of it.
"""
