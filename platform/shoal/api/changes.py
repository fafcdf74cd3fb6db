"""What a request may change of a release, as the bodies of its routes."""

from __future__ import annotations

from pydantic import ConfigDict, Field

from shoal.api.wire import Wire


class ReleaseRequest(Wire):
    why: str = Field(min_length=1, max_length=1000, description="the reason, for the audit log")
    version: str | None = Field(
        None, max_length=40, description="number, or X-Shoal-Version [the candidate; of a rollback what was done last]"
    )
    force: bool = Field(False, description="also what the gate did not let pass; the audit log says so")
    model_config = ConfigDict(json_schema_extra={"examples": [{"why": "better on the new catalogue", "version": "13"}]})
