-- Enqueues one job, once: a resend finds the control hash and changes nothing.
-- ARGV: P R id queue iso max_attempts min_protocol deadline_ms timeout_ms abandon_ms result_ttl stream field value …
-- Returns {created 0|1, state}.
local id, queue, iso = ARGV[3], ARGV[4], ARGV[5]
local state = redis.call('HGET', k_job(id), 'st')
if state then return {0, state} end
-- What an earlier life of this id, or a hand, left behind. Only where there is any: a write that
-- frees memory would let the rest of the script pass a full Redis.
if redis.call('EXISTS', k_rq_job(id), k_events(id), k_rq_results(id)) > 0 then
  redis.call('DEL', k_rq_job(id), k_events(id), k_rq_results(id))
end
local now = now_ms()
local relative = tonumber(ARGV[8])
local deadline = relative > 0 and now + relative or 0
-- The index first, then the list: what a list lost, the reconciler finds in the index.
redis.call('HSET', k_job(id), 'st', 'queued', 'q', queue, 'ep', 0, 'ow', '', 'seq', 0, 'at', 0,
  'ma', ARGV[6], 'mp', ARGV[7], 'dl', int(deadline), 'to', ARGV[9], 'ab', ARGV[10], 'ttl', ARGV[11],
  'sm', ARGV[12], 'ca', '', 'en', int(now), 'nd', 0)
redis.call('ZADD', k_open(queue), int(now), id)
if deadline > 0 then redis.call('ZADD', k_deadlines(), int(deadline), id) end
redis.call('HSET', k_rq_job(id), unpack(ARGV, 13))
redis.call('SADD', k_rq_queues(), k_rq_queue(queue))
redis.call('RPUSH', k_rq_queue(queue), id)
redis.call('PUBLISH', k_wake(queue), id)
return {1, 'queued'}
