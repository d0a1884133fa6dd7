"""Fine-tuning: a recipe (`config`) and prepared data in, the weights of the best epoch out.

`finetune` wires the stages, `loop` runs them, `optim` makes the optimizer and its schedule, `checkpoint` saves and
resumes, `history` writes the curves.
"""
