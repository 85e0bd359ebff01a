"""Celery's settings, read when the first worker, beat or message needs them.

Messages are wake-ups: all may be lost or come ten times. So nothing is kept as a result, nothing
waits in the broker for its time, and a message that nobody took within a minute is thrown away,
because by then the reconcile pass has sent another.
"""

from infra.settings import Settings
from tasks.schedule import BEAT

broker_url = Settings.from_env().redis_url.reveal()
broker_connection_retry_on_startup = True
#: A worker that died keeps its messages for so long (seconds); the database does not wait for it.
broker_transport_options = {"visibility_timeout": 300}
task_acks_late = True
task_reject_on_worker_lost = True
worker_prefetch_multiplier = 1
task_ignore_result = True
task_store_errors_even_if_ignored = False
task_default_queue = "stoker"
# Customers' slow endpoints and Vast's spacing each hold threads; a worker of its own for webhooks
# keeps the one from waiting for the other.
task_routes = {"relay": {"queue": "relay"}}
task_serializer = "json"
accept_content = ["json"]
worker_hijack_root_logger = False
worker_send_task_events = False
timezone = "UTC"
beat_schedule = BEAT
# In memory: the schedule is the same at each start, and a second beat is harmless.
beat_scheduler = "celery.beat:Scheduler"
beat_max_loop_interval = 1
