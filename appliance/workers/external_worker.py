#!/usr/bin/env python3
"""A foreign worker: takes references from Pulsar, works, and tells the appliance how it ended.

An example to start from; docs/external-workers.md explains each step. Settings come from the environment:

    PULSAR_SERVICE_URL        pulsar://127.0.0.1:6650
    PULSAR_AUTH_TOKEN         (none)     or PULSAR_AUTH_TOKEN_FILE
    PULSAR_CA_FILE            (none)     private CA for pulsar+ssl
    DEALSCALE_TOPIC           persistent://dealscale/production/dealscale.ai.inference
    DEALSCALE_SUBSCRIPTION    dealscale
    DEALSCALE_URL             http://127.0.0.1:8000
    DEALSCALE_ENVIRONMENT     production
    WORKER_COUNT              (none)     end after so many events: for tests

The work itself is `work()`: it gets the parsed payload and returns, or raises. `Permanent` is a failure that trying again
cannot help.
"""

import base64
import hashlib
import json
import os
import signal
import sys
import time
import urllib.error
import urllib.request

import pulsar
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

RETRY_AFTER_MS = 5_000
# Less than RETRY_AFTER_MS: what comes again has waited longer.
KEYS_AGAIN_S = 3
TOKEN_MAX = 8 * 1024


class Permanent(Exception):
    """The work failed, and would fail again."""


class Rejected(Exception):
    """The message is not a reference that we believe."""


class Later(Exception):
    """Cannot be decided now: the message has to come again."""


def work(payload, claims):
    """Replace this. Whatever it does has to bear being done twice: delivery is at least once."""
    print(f"{claims['execution_id']} of {claims['tenant_id']}: {json.dumps(payload)[:200]}", flush=True)
    if isinstance(payload, dict) and payload.get("fail") == "permanently":
        raise Permanent("the payload asked for it")


class Appliance:
    """The appliance's two doors for workers, and its public keys."""

    def __init__(self, url):
        self.url = url.rstrip("/")
        self.keys = {}
        self.fetched = -KEYS_AGAIN_S

    def _call(self, path, token=None, body=None):
        headers = {}
        if token:
            headers["authorization"] = "Bearer " + token
        if body is not None:
            headers["content-type"] = "application/json"
            body = json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data=body, headers=headers)
        with urllib.request.urlopen(request, timeout=30) as response:
            return response.read()

    def key(self, kid, again):
        """The key, or None when the appliance was asked since the message came first and has none of that name."""
        if kid in self.keys:
            return self.keys[kid]
        # An unknown key may be a new one. Forged key ids must not make us ask all the time, and a good message must not
        # be refused because we asked a moment before its key was made: it comes again when we may ask.
        if time.monotonic() - self.fetched < KEYS_AGAIN_S:
            if again:
                return None
            raise Later("its key is not known yet")
        found = json.loads(self._call("/.well-known/jwks.json"))["keys"]
        self.fetched = time.monotonic()
        self.keys = {
            key["kid"]: Ed25519PublicKey.from_public_bytes(unbase64url(key["x"]))
            for key in found
            if key.get("kty") == "OKP" and key.get("crv") == "Ed25519"
        }
        return self.keys.get(kid)

    def payload(self, claims, reference):
        return self._call(f"/executions/{claims['execution_id']}/payload", token=reference)

    def result(self, claims, reference, **result):
        self._call(f"/executions/{claims['execution_id']}/result", token=reference, body=result)


def unbase64url(text):
    return base64.b64decode(text + "=" * (-len(text) % 4), altchars=b"-_", validate=True)


def verify(reference, appliance, environment, topic, again=False):
    """The recipe: form, header, key, signature, and only then the claims."""
    if len(reference) > TOKEN_MAX or reference.count(".") != 2:
        raise Rejected("not a reference")
    signed, signature = reference.rsplit(".", 1)
    header, body = signed.split(".")
    try:
        header = json.loads(unbase64url(header))
        signature = unbase64url(signature)
    except (ValueError, RecursionError) as error:
        raise Rejected("not a reference") from error
    # Exactly this header: what a token says about its own algorithm is not believed.
    if not isinstance(header, dict) or set(header) != {"alg", "kid", "typ"}:
        raise Rejected("not our header")
    if header["alg"] != "EdDSA" or header["typ"] != "JWT" or not isinstance(header["kid"], str):
        raise Rejected("not our header")
    key = appliance.key(header["kid"], again)
    if key is None:
        raise Rejected("signed with an unknown key")
    try:
        key.verify(signature, signed.encode())
    except InvalidSignature as error:
        raise Rejected("the signature is wrong") from error
    claims = json.loads(unbase64url(body))
    if claims["environment"] != environment:
        raise Rejected("signed for another environment")
    if claims["topic"] != topic:
        raise Rejected("signed for another topic")
    # `exp` bounds trust, not work: the appliance decides, it answers 404 for what is expired and not open.
    return claims


def own_name(topic):
    """`dealscale.ai.inference` of `persistent://tenant/namespace/dealscale.ai.inference-partition-0`."""
    name = topic.rsplit("/", 1)[1]
    base, found, number = name.rpartition("-partition-")
    return base if found and number.isdigit() else name


def handle(message, consumer, letters, appliance, environment):
    reference = message.data().decode("ascii", errors="replace")
    topic = own_name(message.topic_name())
    try:
        claims = verify(reference, appliance, environment, topic, again=message.redelivery_count() > 0)
    except Rejected as reason:
        properties = dict(message.properties())
        properties.update(dead_letter_reason=str(reason), original_topic=topic, original_message_id=str(message.message_id()))
        letters.send(message.data(), properties=properties)
        consumer.acknowledge(message)
        print(f"rejected: {reason}", file=sys.stderr, flush=True)
        return
    try:
        body = appliance.payload(claims, reference)
    except urllib.error.HTTPError as error:
        if error.code in (404, 409):
            # It has ended, or is unknown: nothing is left to do.
            consumer.acknowledge(message)
            return
        raise
    if hashlib.sha256(body).hexdigest() != claims["payload_sha256"]:
        raise RuntimeError("the payload is not what the reference says")
    begin = time.monotonic()
    took = lambda: int((time.monotonic() - begin) * 1000)  # noqa: E731
    try:
        work(json.loads(body), claims)
    except Permanent as error:
        appliance.result(claims, reference, state="failed", error=str(error), duration_ms=took())
    except Exception as error:  # whatever the work raises is an attempt that failed
        appliance.result(claims, reference, state="failed", retry=True, error=repr(error), duration_ms=took())
        consumer.negative_acknowledge(message)
        return
    else:
        appliance.result(claims, reference, state="succeeded", duration_ms=took())
    # Only now: a worker that dies before this gets the message again.
    consumer.acknowledge(message)


def main():
    setting = os.environ.get
    topic = setting("DEALSCALE_TOPIC", "persistent://dealscale/production/dealscale.ai.inference")
    environment = setting("DEALSCALE_ENVIRONMENT", "production")
    token = setting("PULSAR_AUTH_TOKEN")
    if setting("PULSAR_AUTH_TOKEN_FILE"):

        def token():  # asked at each connection: the file may be renewed
            with open(setting("PULSAR_AUTH_TOKEN_FILE"), encoding="ascii") as file:
                return file.read().strip()

    client = pulsar.Client(
        setting("PULSAR_SERVICE_URL", "pulsar://127.0.0.1:6650"),
        authentication=pulsar.AuthenticationToken(token) if token else None,
        tls_trust_certs_file_path=setting("PULSAR_CA_FILE"),
        logger=pulsar.ConsoleLogger(pulsar.LoggerLevel.Warn),
    )

    def subscribe():
        return client.subscribe(
            topic,
            setting("DEALSCALE_SUBSCRIPTION", "dealscale"),
            # Events of one ordering key come to one worker, in order.
            consumer_type=pulsar.ConsumerType.KeyShared,
            initial_position=pulsar.InitialPosition.Earliest,
            negative_ack_redelivery_delay_ms=RETRY_AFTER_MS,
            receiver_queue_size=10,
        )

    running = True

    def stop(*_):
        nonlocal running
        running = False

    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, stop)
    place, name = topic.rsplit("/", 1)
    consumer = None
    while running and consumer is None:
        try:
            letters = client.create_producer(f"{place}/dealscale.deadletter.{name.removeprefix('dealscale.')}")
            consumer = subscribe()
        except pulsar.PulsarException as error:  # Pulsar is away, or the appliance has not made the topic yet
            print(f"cannot subscribe, will try again: {error!r}", file=sys.stderr, flush=True)
            time.sleep(RETRY_AFTER_MS / 1000)
    if consumer is None:
        return
    appliance = Appliance(setting("DEALSCALE_URL", "http://127.0.0.1:8000"))
    left = int(setting("WORKER_COUNT", "0")) or -1
    while running and left != 0:
        try:
            message = consumer.receive(timeout_millis=1000)
        except pulsar.Timeout:
            continue
        try:
            handle(message, consumer, letters, appliance, environment)
            left -= 1
        except Exception as error:  # the appliance or Pulsar is away: the message comes again
            print(f"cannot finish, will try again: {error!r}", file=sys.stderr, flush=True)
            consumer.negative_acknowledge(message)
    client.close()


if __name__ == "__main__":
    main()
