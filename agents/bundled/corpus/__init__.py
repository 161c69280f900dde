"""The text from which the bundled model is built: a module per skill, each `document(rng, held_out)` → text.

A document carries *marks* (see `marks`): spans that the text before them determines. They are taken out
before tokenisation; training weighs them higher, and the skill table is the probability that the model gives
to them.
"""
