from causal_wan.library_messages import hold_back


hold_back()
