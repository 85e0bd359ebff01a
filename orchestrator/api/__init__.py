"""The public REST interface, `/v1`."""
