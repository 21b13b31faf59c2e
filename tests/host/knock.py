"""Connects again and again, and prints how many times that was refused.

knock.py PORT TIMES
"""
import socket
import sys

refused = 0
for _ in range(int(sys.argv[2])):
    try:
        socket.create_connection(("127.0.0.1", int(sys.argv[1])), timeout=2).close()
    except OSError:
        refused += 1
print(refused)
