-- Enqueues jobs, each once: a resend finds the control hash and changes nothing.
-- ARGV: P R iso, then a job: id queue max_attempts min_protocol deadline_ms timeout_ms abandon_ms result_ttl stream
--   tenant ('': none) marks ('': none, see claim.lua) n, and n of RQ's fields and values in turn.
-- Returns per job {created 0|1, state}, or {0, '', limit, queued} where its tenant has as many queued as it may.
local iso = ARGV[3]
local replies = {}
local now = now_ms()

-- `at`: the job's place in ARGV; `fields`, `last`: where its RQ hash begins and ends.
local function enqueue(at, fields, last)
  local id, queue = ARGV[at], ARGV[at + 1]
  local state = redis.call('HGET', k_job(id), 'st')
  if state then return {0, state} end
  local tenant = ARGV[at + 9]
  local limit = tenant ~= '' and limit_of(tenant, 'queued')
  if limit then
    local queued = members_of(k_tenant_queued(tenant))
    if queued >= limit then return {0, '', limit, queued} end
  end
  -- What an earlier life of this id, or a hand, left behind. Only where there is any: a write that
  -- frees memory would let the rest of the script pass a full Redis.
  if redis.call('EXISTS', k_rq_job(id), k_events(id), k_rq_results(id)) > 0 then
    redis.call('DEL', k_rq_job(id), k_events(id), k_rq_results(id))
  end
  local relative = tonumber(ARGV[at + 4])
  local deadline = relative > 0 and now + relative or 0
  -- The index first, then the list: what a list lost, the reconciler finds in the index.
  redis.call('HSET', k_job(id), 'st', 'queued', 'q', queue, 'ep', 0, 'ow', '', 'seq', 0, 'at', 0,
    'ma', ARGV[at + 2], 'mp', ARGV[at + 3], 'dl', int(deadline), 'to', ARGV[at + 5], 'ab', ARGV[at + 6],
    'ttl', ARGV[at + 7], 'sm', ARGV[at + 8], 'ca', '', 'en', int(now), 'nd', 0)
  redis.call('ZADD', k_open(queue), int(now), id)
  if deadline > 0 then redis.call('ZADD', k_deadlines(), int(deadline), id) end
  redis.call('HSET', k_rq_job(id), unpack(ARGV, fields, last))
  redis.call('SADD', k_rq_queues(), k_rq_queue(queue))
  redis.call('RPUSH', k_rq_queue(queue), id)
  if ARGV[at + 10] ~= '' then redis.call('HSET', k_job(id), 'af', ARGV[at + 10]) end
  if tenant ~= '' then
    redis.call('HSET', k_job(id), 'tn', tenant)
    tolerantly(tenant_waits, id, queue, tenant, 'RPUSH')
  end
  redis.call('PUBLISH', k_wake(queue), id)
  return {1, 'queued'}
end

local at = 4
while at <= #ARGV do
  local last = at + 11 + tonumber(ARGV[at + 11])
  replies[#replies + 1] = enqueue(at, at + 12, last)
  at = last + 1
end
return replies
