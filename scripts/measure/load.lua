-- For wrk: one request in BLAST_EVERY is for /die (0: none); counts what was sent and answered, as JSON at the end.
local every = tonumber(os.getenv("BLAST_EVERY"))
local threads = {}

function setup(thread)
  table.insert(threads, thread)
end

function init(args)
  sent, fatal, ok, failed = 0, 0, 0, 0
end

function request()
  sent = sent + 1
  if every > 0 and sent % every == 0 then
    fatal = fatal + 1
    return wrk.format("GET", "/die")
  end
  return wrk.format("GET", "/")
end

function response(status)
  if status == 200 then ok = ok + 1 else failed = failed + 1 end
end

function done(summary, latency)
  local totals = { sent = 0, fatal = 0, ok = 0, failed = 0 }
  for _, thread in ipairs(threads) do
    for name in pairs(totals) do totals[name] = totals[name] + thread:get(name) end
  end
  local errors = summary.errors.connect + summary.errors.read + summary.errors.write + summary.errors.timeout
  print(string.format(
    '{"sent": %d, "fatal": %d, "ok": %d, "failed": %d, "errors": %d, "seconds": %f, "p50": %f, "p99": %f}',
    totals.sent, totals.fatal, totals.ok, totals.failed, errors, summary.duration / 1e6,
    latency:percentile(50) / 1e3, latency:percentile(99) / 1e3))
end
