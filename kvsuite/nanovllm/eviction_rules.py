"""What is known of a policy of every token before anything is looked at: when, how many, and by which rule one token goes."""

from __future__ import annotations

from kvsuite.compression.base import Policy
from kvsuite.compression.ranked import NormRule, RankedPolicy

from .prompt_eviction import scores_norms


class EvictionRules:
    """A policy's sizes and rules of lengths that were met.

    Parameters
    ----------
    policy
        What decides.
    by_age
        Whether a token may be found by its age.
    by_norm
        Whether it may be found by the norm of its key.
    """

    def __init__(self, policy: Policy, *, by_age: bool, by_norm: bool) -> None:
        self._policy = policy
        self._by_age = by_age
        self._by_norm = by_norm and scores_norms(policy)
        self._sizes: dict[int, int] = {}
        self._rules: dict[int, NormRule | int | None] = {}
        own_due = type(policy).due is not Policy.due
        #: whether the policy is due after every token, whatever was seen and done
        self.always_due = policy.acts == "decode" and not own_due and policy.schedule.name == "every_token"

    def size_after(self, length: int) -> int:
        """`Policy.size_after` of a length."""
        found = self._sizes.get(length)
        if found is None:
            found = self._sizes[length] = self._policy.size_after(length)
        return found

    def of(self, length: int) -> NormRule | int | None:
        """The rule by which one of ``length`` tokens goes: by norm, or how many older ones stay; ``None``: it has none."""
        if length not in self._rules:
            found: NormRule | int | None = None
            if self._by_age:
                found = oldest_rule_of(self._policy, length)
            elif self._by_norm:
                found = norm_rule_of(self._policy, length)
            self._rules[length] = found
        return self._rules[length]


def norm_rule_of(policy: Policy, length: int) -> NormRule | None:
    """`RankedPolicy.norm_rule` of a policy whose priority and victim are what the rule says; ``None`` of any other."""
    if not isinstance(policy, RankedPolicy) or type(policy).victim is not RankedPolicy.victim:
        return None
    return policy.norm_rule(length) if _of_one_class(policy, "priority", "norm_rule") else None


def oldest_rule_of(policy: Policy, length: int) -> int | None:
    """`Policy.oldest_rule` of a policy whose victim is what the rule says; ``None`` of any other."""
    return policy.oldest_rule(length) if _of_one_class(policy, "victim", "oldest_rule") else None


def _of_one_class(policy: Policy, *names: str) -> bool:
    """Whether a policy has these methods from one and the same class."""
    return len({next(each for each in type(policy).__mro__ if name in vars(each)) for name in names}) == 1
