"""What a model can be given: text, chat messages and images, as token ids and patches.

May import errors, config and presets; never torch, ray or HTTP.
"""
