"""A real branch on this machine: HTTP, WebSocket and, given a RabbitMQ, AMQP, as the platform speaks them.

with Sandbox(leaves=3) as sandbox:
    client = Client(sandbox.credentials[0], host=sandbox.url)
"""

from branchkey_integrations.sandbox.answer import Answer
from branchkey_integrations.sandbox.chaos import Chaos
from branchkey_integrations.sandbox.intercept import ROUTES, Call, Interception
from branchkey_integrations.sandbox.local import Sandbox
from branchkey_integrations.sandbox.records import Upload

__all__ = ["Sandbox", "Chaos", "Upload", "Answer", "Call", "Interception", "ROUTES"]
