"""A fleet on paper: N edge devices, their links and an autoscaled cloud, simulated.

model     what a fleet is: arrivals, times, limits, replicas; plain values, checked
workload  what the images of a recorded exits table do under a policy
rates     how busy the day is: one curve for all devices
scaling   Ray Serve's rule for the number of replicas
queueing  how long a call waits for a replica, in closed form
pool      one edge replica, image by image
exact     every image and call of every device an event, by SimPy
aggregate the cloud's calls as one stream, a slot of time at a stroke: to a million devices
outcome   what a simulation comes to
advice    where the cloud becomes the bottleneck, and what threshold would move it
page      the figure and the page
"""
