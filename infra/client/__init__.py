"""The Python client: generated from the API's description, with a thin helper beside.

`python -m infra.client --spec docs/openapi.json OUT` makes it; nothing generated is committed.
`stoker-client/` holds what is added: `training.py` (photographs in, weights out), `webhooks.py`
(verify a delivery, by the very code that signs it), and how the package is built.
"""
