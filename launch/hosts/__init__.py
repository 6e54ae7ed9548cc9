"""Hosts: the hostfile, reaching them by ssh, the placement of ranks, and the rendezvous."""
