"""One model is loaded at a time: hosts build them on the meta device by a switch that is global."""

from threading import Lock

LOADING = Lock()
