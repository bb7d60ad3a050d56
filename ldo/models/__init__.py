"""The models that LDO works with, and what is done to them: generators, the world model, LoRA, attention, flow."""
