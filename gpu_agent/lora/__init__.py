"""Our LoRA trainer: a program of its own, run by the agent as a subprocess.

``python -m gpu_agent.lora --job job.json`` reads orders from stdin and writes one JSON object
per line to stdout (see `__main__`). It is the only place in Stoker that knows torch, and no
module here imports torch before the job has been checked, so that a bad job fails in a second.

Where to look: `job` what is to be done, `data` images and captions, `families` the base models,
`cache` what is computed once, `draws` randomness by (seed, step), `loop` the training,
`evaluate` the validation loss, `checkpoint` stopping and going on, `export` the result.
"""
