"""What operators ask, beside `/v1/hosts`: alarms, instances, money, sweeps, offers.

Only for keys with the scope `operator`. Each part has a plain function that a page may call, too.
"""

from __future__ import annotations

from flask import Response
from flask_openapi.blueprint import APIBlueprint
from flask_openapi.models.tag import Tag

from orchestrator.api import account, auth, instances, offers, present, schemas, spend, sweeps
from orchestrator.deps import Deps
from state import alarms


def operators(deps: Deps) -> APIBlueprint:
    api = APIBlueprint(
        "operators",
        __name__,
        url_prefix="/v1",
        abp_tags=[Tag(name="operators")],
        abp_security=[{"key": []}],
    )
    api.before_request(lambda: auth.admit_operator(deps.store))
    for part in (instances, spend, account, sweeps, offers):
        part.register(api, deps)

    @api.get("/alarms", operation_id="list_alarms", responses={"200": schemas.Alarms})
    def list_alarms() -> Response:
        """What needs an operator now, the critical first"""
        settings = deps.settings
        with deps.store.transaction() as tx:
            stand = alarms.standing(
                tx, settings.limits, deps.clock(), kill_switch=settings.kill_switch
            )
        shown = [
            schemas.Alarm(
                code=item.code,
                severity=item.severity,
                message=item.message,
                since=item.since,
                mend=item.mend,
            )
            for item in stand
        ]
        return present.answer(schemas.Alarms(alarms=shown))

    return api
