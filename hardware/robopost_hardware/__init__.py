# SPDX-License-Identifier: Apache-2.0
"""robopost_hardware: real arms. Filled by the ROS 2 and fleet parts."""
