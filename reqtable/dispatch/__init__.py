"""Dispatch policies: where the steps of a request run. One file a policy, found by its name in one registry."""

from reqtable.dispatch.policy import Policy, check_policy, check_servable, is_resumable, policy_named, policy_names

__all__ = ["Policy", "check_policy", "check_servable", "is_resumable", "policy_named", "policy_names"]
