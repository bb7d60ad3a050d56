"""How many items are worked on at a time where a recipe does not say.

The stages use these, and the memory plan counts them.
"""

PREPARED_CLIPS = 32  # clips encoded, or prompts embedded, at a time where they are kept in memory
GATE_CLIPS = 50  # clips scored at a time at the gate
SELF_CLIPS = 16  # clips sampled at a time in self mode, without rl.micro_batch
