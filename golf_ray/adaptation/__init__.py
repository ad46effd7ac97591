"""Doc-independent LoRA test-time training: adapters, their randomness, optimizer, plan, engine."""
