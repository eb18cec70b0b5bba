"""Dispatch policies: where the steps of a request run.

This package has all that the author of a policy needs. Derive the policy from `Policy`, and register it under the entry
point group `reqtable.dispatch`. See `examples/stopwatch.py`.
"""

from reqtable.dispatch.checks import check_servable, is_resumable
from reqtable.dispatch.policies.inline import Inline
from reqtable.dispatch.policy import Host, Policy
from reqtable.dispatch.registry import check_policy, policy_named, policy_names
from reqtable.dispatch.run_blocking import run
from reqtable.net.poll_only import PollOnly
from reqtable.table.parts import Resumable
from reqtable.table.table import Entry
from reqtable.table.want import Want

__all__ = [
    "Entry",
    "Host",
    "Inline",
    "Policy",
    "PollOnly",
    "Resumable",
    "Want",
    "check_policy",
    "check_servable",
    "is_resumable",
    "policy_named",
    "policy_names",
    "run",
]
