"""The method itself, on tensors: teacher, alignment loss, critic, guards, rollouts and objectives.

Knows no files, ranks or run folders.
"""
