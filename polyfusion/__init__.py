"""Low-rank polynomial fusion of views, with fused kernels.

    from polyfusion import ops, nn
    z = ops.cp_fusion([speech, identity], [a2, a3], a1)      # speech (B, T, a), identity (B, d)

``polyfusion.ops`` holds the functions, ``polyfusion.nn`` the modules, and
``python -m polyfusion.info`` says which kernels run on this machine.
"""

__version__ = "0.1.0.dev0"
