"""The paper's experiments on real data: methods, tables and figures, all trained and tuned alike.

The command ``igm-rs`` runs them. Needs the extra ``igm-rs[experiments]``; nothing in the core imports it.
"""
