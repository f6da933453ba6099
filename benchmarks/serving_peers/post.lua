-- wrk -s post.lua URL -- BODIES: posts the bodies of a file (each after its length, 4 bytes, little-endian) in turn.
local requests, turn = {}, 0

function init(args)
  local file = assert(io.open(args[1], "rb"))
  local data = file:read("*a")
  file:close()
  local place = 1
  while place < #data do
    local a, b, c, d = data:byte(place, place + 3)
    local size = a + 256 * (b + 256 * (c + 256 * d))
    local body = data:sub(place + 4, place + 3 + size)
    local headers = { ["content-type"] = args[2] }
    requests[#requests + 1] = wrk.format("POST", nil, headers, body)
    place = place + 4 + size
  end
end

function request()
  turn = turn % #requests + 1
  return requests[turn]
end

function done(summary, latency, _)
  local failed = summary.errors.connect + summary.errors.read + summary.errors.write + summary.errors.timeout
  io.write(string.format(
    '\n{"requests": %d, "seconds": %f, "failed": %d, "refused": %d, "p50_ms": %f, "p99_ms": %f}\n',
    summary.requests, summary.duration / 1e6, failed, summary.errors.status,
    latency:percentile(50) / 1e3, latency:percentile(99) / 1e3))
end
