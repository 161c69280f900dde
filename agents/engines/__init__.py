"""Engines: who speaks for the policy. Token ids in, token ids and log-probs out; or text, where there are no ids."""

from agents.engines.base import Engine, Key, Said, Sampled, SampleParams, Speaker, Voice

__all__ = ["Engine", "Key", "Said", "SampleParams", "Sampled", "Speaker", "Voice"]
