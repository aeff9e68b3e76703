"""How messages travel between parties that are not on the virtual clock.

A transport sends bytes to a party by name and receives them from any. `InProcess` joins the
threads of one process, `Socket` processes and machines over TCP, `Shaped` puts a link's delay
and losses in front of either, and `drive` runs a party of the clock over one of them.
"""

from __future__ import annotations

from isthmus.wire.transport.base import Closed, Received, Transport
from isthmus.wire.transport.drive import drive
from isthmus.wire.transport.inprocess import InProcess
from isthmus.wire.transport.shaped import Shaped
from isthmus.wire.transport.sockets import Socket

__all__ = ["Closed", "InProcess", "Received", "Shaped", "Socket", "Transport", "drive"]
