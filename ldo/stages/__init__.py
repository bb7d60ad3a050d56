"""The stages of a run, in order: gate, align (and its SFT control), reinforce, evaluate."""
