"""What is done with a LoRA besides training it.

::

    python -m gpu_agent.lora.tools merge BASE LORA OUT --family sdxl --scale 0.8
    python -m gpu_agent.lora.tools extract BASE TUNED OUT --family sdxl --rank 32
    python -m gpu_agent.lora.tools resize LORA OUT --rank 8

`merge` writes a base with a LoRA's change made for good, `extract` makes a LoRA of what tells a
tuned model from its base, `resize` makes one of a lower rank. A base is a diffusers folder, or for
Stable Diffusion 1.x, 2.x and XL a single file; it is read and written tensor by tensor.
"""
