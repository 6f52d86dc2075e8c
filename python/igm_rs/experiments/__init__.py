"""The demonstration on recorded data: IGM beside its alternatives, each trained and tuned alike.

``python -m igm_rs.experiments`` runs it. Needs the extra ``igm-rs[experiments]``; nothing in the core imports it.
"""
