"""Run by Alembic for every command, on the connection that `infra.migrations` put there."""

from alembic import context

from infra import schema

context.configure(
    connection=context.config.attributes["connection"],
    target_metadata=schema.metadata,
    transaction_per_migration=False,
)
with context.begin_transaction():
    context.run_migrations()
