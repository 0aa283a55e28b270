"""Splits samples into train and val by a seed: every class is in both where it can be, and groups stay together."""

import re
import zlib
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence

from apcnet.keys import keyed

VAL_SHARE = 0.2


def choose_val(
    names: Sequence[str],
    present: Mapping[str, Collection[int]] | None = None,
    share: float = VAL_SHARE,
    seed: int = 0,
    groups: Mapping[str, str] | None = None,
) -> set[str]:
    """Chooses the names of the val split: about this share of all, and of the names with each class, rarest first.

    The choice depends on the names, not on their order. Without classes and groups it is random.

    Args:
        names: The names of the samples.
        present: The classes of each sample, if they are known.
        share: The share of the val split, of at least one sample.
        seed: Another seed gives another split.
        groups: The group of each sample; a group is never divided.
    """
    members = defaultdict(list)
    for name in names:
        members[groups[name] if groups else name].append(name)
    order = sorted(members, key=lambda group: (keyed(seed, zlib.crc32(group.encode(errors="surrogateescape"))), group))
    labels = {group: {label for name in members[group] for label in (present or {}).get(name, ())} for group in order}
    holding = defaultdict(list)  # the groups that hold each class, in the random order
    for group in order:
        for label in labels[group]:
            holding[label].append(group)
    val: set[str] = set()
    full: set[int] = set()  # the classes of which val holds its share

    def fill(candidates: list[str], wanted: float) -> None:
        """Moves groups to val until it holds the wanted number of samples, and leaves one group at least."""
        count, left = (
            sum(len(members[group]) for group in candidates if group in val),
            sum(group not in val for group in candidates),
        )
        for group in sorted(candidates, key=lambda group: len(labels[group] & full)):  # stable: otherwise random
            if count >= wanted or left <= 1:
                return
            if group not in val:
                val.add(group)
                count, left = count + len(members[group]), left - 1

    for label in sorted(holding, key=lambda label: (len(holding[label]), label)):
        total = sum(len(members[group]) for group in holding[label])
        fill(holding[label], max(1, round(share * total)))
        full.add(label)
    fill(order, max(1, round(share * len(names))))
    return {name for group in val for name in members[group]}


def groups_by(pattern: str, names: Sequence[str]) -> dict[str, str]:
    """Groups names by what a pattern matches in them: its first group, or all of the match."""
    try:
        compiled = re.compile(pattern)
    except re.error as error:
        raise ValueError(f"groups: expected a regular expression, got {pattern!r} ({error})") from None
    found = {name: compiled.search(name) for name in names}
    if unmatched := [name for name, match in found.items() if match is None]:
        raise ValueError(
            f"groups: expected a pattern that matches every name, but {pattern!r} does not match {unmatched[0]!r}"
        )
    return {name: match[1] if compiled.groups else match[0] for name, match in found.items() if match}
