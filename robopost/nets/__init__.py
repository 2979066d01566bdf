# SPDX-License-Identifier: Apache-2.0
"""Networks the policies and critics are made of."""
