"""Serving configs and rules: what there is, and how it changes at run time.

The newest state is one immutable `Configuration`; a request takes it once. It is built from the documents of
a directory that every replica looks at. A document that cannot be read or does not validate leaves the last
good content in service, and is reported.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from services.recommend.domain.rules import Rule
from services.recommend.domain.serving_config import BUILT_IN, ServingConfig
from services.recommend.ports import Clock, Codec, DocumentKind, Documents
from shared.errors import Aborted, AlreadyExists, FailedPrecondition, NotFound, ShopkeeperError


@dataclass(frozen=True, slots=True)
class Configuration:
    """One state of all serving configs and rules. Immutable."""

    configs: Mapping[str, ServingConfig] = field(default_factory=lambda: dict(BUILT_IN))
    rules: Mapping[str, Rule] = field(default_factory=dict)

    def config(self, serving_config_id: str) -> ServingConfig:
        """Returns a serving config.

        Raises:
            NotFound: SERVING_CONFIG_NOT_FOUND.
        """
        config = self.configs.get(serving_config_id)
        if config is None:
            raise NotFound(
                "SERVING_CONFIG_NOT_FOUND",
                f"No serving config {serving_config_id}; ListServingConfigs names those there are.",
                {"servingConfigId": serving_config_id},
            )
        return config

    def rule(self, rule_id: str) -> Rule:
        """Returns a rule; raises NotFound RULE_NOT_FOUND."""
        rule = self.rules.get(rule_id)
        if rule is None:
            raise NotFound(
                "RULE_NOT_FOUND",
                f"No rule {rule_id}; ListRules names those there are.",
                {"ruleId": rule_id},
            )
        return rule

    def rules_of(self, config: ServingConfig) -> list[Rule]:
        """Returns the config's rules, in its order; those that were deleted meanwhile are passed over."""
        return [rule for rule_id in config.rule_ids if (rule := self.rules.get(rule_id)) is not None]


class ServingConfigs:
    """Reads, follows and changes the configuration.

    Args:
        on_refused: told of each document that was left out: kind, id, why.
    """

    def __init__(
        self,
        documents: Documents,
        codec: Codec,
        clock: Clock,
        on_refused: Callable[[str, str, str], None] = lambda _kind, _id, _why: None,
    ) -> None:
        self._documents = documents
        self._codec = codec
        self._clock = clock
        self._on_refused = on_refused
        self._lock = threading.RLock()
        self._stamps: Mapping[tuple[DocumentKind, str], tuple[int, int, int]] = {}
        self._current = Configuration()

    def current(self) -> Configuration:
        """Returns the newest state."""
        return self._current

    def look(self) -> None:
        """Takes in what has changed in the directory. Never fails."""
        with self._lock:
            stamps = self._documents.stamps()
            if stamps == self._stamps:
                return
            configs, rules = dict(self._current.configs), dict(self._current.rules)
            for kind, document_id in self._stamps.keys() - stamps.keys():
                if kind is DocumentKind.RULE:
                    rules.pop(document_id, None)
                elif document_id not in BUILT_IN:
                    configs.pop(document_id, None)
            for (kind, document_id), stamp in stamps.items():
                if self._stamps.get((kind, document_id)) == stamp:
                    continue
                try:
                    content = self._documents.read(kind, document_id)
                    if content is None:
                        continue
                    if kind is DocumentKind.RULE:
                        rules[document_id] = self._codec.decode_rule(document_id, content)
                    elif document_id in BUILT_IN:
                        raise ValueError("its id is of a built-in serving config")
                    else:
                        configs[document_id] = self._codec.decode_config(document_id, content)
                except ShopkeeperError as error:
                    self._on_refused(kind.value, document_id, f"{error.reason}: {error.message}")
                except Exception as error:
                    self._on_refused(kind.value, document_id, f"{type(error).__name__}: {error}")
            self._stamps = stamps
            self._current = Configuration(configs, rules)

    def list_configs(self, limit: int, after: str) -> tuple[Sequence[ServingConfig], str]:
        """Returns the configs after an id, by id, and the id after which the next page begins, or ""."""
        return _page(self._current.configs, limit, after)

    def list_rules(self, limit: int, after: str) -> tuple[Sequence[Rule], str]:
        """Returns the rules after an id, by id, and the id after which the next page begins, or ""."""
        return _page(self._current.rules, limit, after)

    def create_config(self, config: ServingConfig) -> ServingConfig:
        """Stores a new serving config and returns it.

        Raises:
            AlreadyExists: SERVING_CONFIG_ALREADY_EXISTS.
            NotFound: RULE_NOT_FOUND: it names a rule that there is not.
            Unavailable: CONFIGURATION_UNAVAILABLE.
        """
        with self._changing():
            if config.serving_config_id in self._current.configs:
                raise AlreadyExists(
                    "SERVING_CONFIG_ALREADY_EXISTS",
                    f"There is a serving config {config.serving_config_id}; update it, or choose another id.",
                    {"servingConfigId": config.serving_config_id},
                )
            return self._store_config(replace(config, version=0, create_time=self._clock.now()))

    def update_config(
        self, config_id: str, etag: str, change: Callable[[ServingConfig], ServingConfig]
    ) -> ServingConfig:
        """Replaces a serving config by what `change` makes of it; raises as `create_config` and `delete_config`."""
        with self._changing():
            current = self._writable(config_id, etag)
            changed = change(current)
            return self._store_config(
                replace(changed, version=current.version, create_time=current.create_time)
            )

    def delete_config(self, config_id: str, etag: str) -> None:
        """Deletes a serving config.

        Raises:
            NotFound: SERVING_CONFIG_NOT_FOUND.
            FailedPrecondition: SERVING_CONFIG_BUILT_IN.
            Aborted: ETAG_MISMATCH.
        """
        with self._changing():
            self._writable(config_id, etag)
            self._documents.delete(DocumentKind.SERVING_CONFIG, config_id)
            self.look()

    def create_rule(self, rule: Rule) -> Rule:
        """Stores a new rule and returns it; raises AlreadyExists RULE_ALREADY_EXISTS, Unavailable."""
        with self._changing():
            if rule.rule_id in self._current.rules:
                raise AlreadyExists(
                    "RULE_ALREADY_EXISTS",
                    f"There is a rule {rule.rule_id}; update it, or choose another id.",
                    {"ruleId": rule.rule_id},
                )
            return self._store_rule(replace(rule, version=0, create_time=self._clock.now()))

    def update_rule(self, rule_id: str, etag: str, change: Callable[[Rule], Rule]) -> Rule:
        """Replaces a rule by what `change` makes of it; raises NotFound RULE_NOT_FOUND, Aborted, Unavailable."""
        with self._changing():
            current = self._current.rule(rule_id)
            _check_etag(etag, current.etag)
            changed = change(current)
            return self._store_rule(
                replace(changed, version=current.version, create_time=current.create_time)
            )

    def delete_rule(self, rule_id: str, etag: str) -> None:
        """Deletes a rule; configs that name it go on without it. Raises as `update_rule`."""
        with self._changing():
            _check_etag(etag, self._current.rule(rule_id).etag)
            self._documents.delete(DocumentKind.RULE, rule_id)
            self.look()

    def _changing(self) -> _Changing:
        return _Changing(self._lock, self._documents, self.look)

    def _writable(self, config_id: str, etag: str) -> ServingConfig:
        current = self._current.config(config_id)
        if current.built_in:
            raise FailedPrecondition(
                "SERVING_CONFIG_BUILT_IN",
                f"{config_id} is built in; create a serving config of your own with the same content.",
                {"servingConfigId": config_id},
            )
        _check_etag(etag, current.etag)
        return current

    def _store_config(self, config: ServingConfig) -> ServingConfig:
        for rule_id in config.rule_ids:
            self._current.rule(rule_id)
        config = replace(config, built_in=False, version=config.version + 1, update_time=self._clock.now())
        config = replace(config, etag=_etag(self._codec.encode_config(replace(config, etag=""))))
        self._documents.write(
            DocumentKind.SERVING_CONFIG, config.serving_config_id, self._codec.encode_config(config)
        )
        self.look()
        return config

    def _store_rule(self, rule: Rule) -> Rule:
        rule = replace(rule, version=rule.version + 1, update_time=self._clock.now())
        rule = replace(rule, etag=_etag(self._codec.encode_rule(replace(rule, etag=""))))
        self._documents.write(DocumentKind.RULE, rule.rule_id, self._codec.encode_rule(rule))
        self.look()
        return rule


class _Changing:
    """A change: alone among all replicas, and upon the newest state."""

    def __init__(self, lock: Any, documents: Documents, look: Callable[[], None]) -> None:
        self._lock = lock
        self._documents = documents
        self._look = look

    def __enter__(self) -> None:
        self._lock.acquire()
        try:
            self._turn = self._documents.turn()
            self._turn.__enter__()
        except BaseException:
            self._lock.release()
            raise
        self._look()

    def __exit__(self, *exception: Any) -> None:
        try:
            self._turn.__exit__(*exception)
        finally:
            self._lock.release()


def _page(entries: Mapping[str, Any], limit: int, after: str) -> tuple[list[Any], str]:
    ids = [entry_id for entry_id in sorted(entries) if entry_id > after]
    return [entries[entry_id] for entry_id in ids[:limit]], ids[limit - 1] if len(ids) > limit else ""


def _etag(content: bytes) -> str:
    return hashlib.blake2b(content, digest_size=8).hexdigest()


def _check_etag(sent: str, current: str) -> None:
    if sent and sent != current:
        raise Aborted(
            "ETAG_MISMATCH",
            "It has changed since this etag was read; read it again and repeat the change.",
            {"etag": current},
        )
