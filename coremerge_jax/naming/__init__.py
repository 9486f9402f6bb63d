"""Names of one module in different releases of a model's code, brought to one form.

transformers renames and fuses weights when it loads a checkpoint, and undoes that on saving.
Checkpoints keep the old names, and adapters have those in memory of the release that trained them.
"""
