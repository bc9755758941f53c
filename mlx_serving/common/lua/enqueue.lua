-- Enqueues jobs, each once: a resend finds the control hash and changes nothing. One with another digest is no resend.
-- ARGV: two prefixes, the wall clock's time in RQ's form, then for each job:
--   id, queue
--   max_attempts, min_protocol, deadline_ms (from now; 0: none), timeout_ms, abandon_ms (0: none), result_ttl,
--   queued_ttl, events_ttl, failed_ttl (seconds), stream (0|1)   as in its control hash
--   tenant, marks, digest             '': none
--   rows                              of the batch that it takes
--   count, and so many                fields and values in turn of RQ's hash of the job
-- Returns for each job: created (0|1), state; or, if it is refused, 0, '' and why: 'queued', limit, queued (its tenant has as many
--   queued as it may); 'running', limit, rows (it has more rows than its
--   tenant may ever run); 'digest' (there is a job of its id with another payload).
local FIRST_JOB = 4
-- A job's arguments, counted from its id.
local ID, QUEUE, MAX_ATTEMPTS, MIN_PROTOCOL, DEADLINE_MS, TIMEOUT_MS, ABANDON_MS, RESULT_TTL, QUEUED_TTL, EVENTS_TTL,
      FAILED_TTL, STREAM, TENANT_NAME, MARKS, DIGEST, ROWS, RQ_COUNT, RQ_FIELDS =
        0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17
local now = now_ms()
local replies = {}

local function given(argument) return argument ~= '' and argument or nil end

-- `at`: the job's place in ARGV; `last`: its last argument.
local function enqueue(at, last)
  local id, queue = ARGV[at + ID], ARGV[at + QUEUE]
  local digest = given(ARGV[at + DIGEST])
  local state, known_digest = unpack(redis.call('HMGET', k_job(id), F.state, F.digest))
  if state and digest and known_digest and digest ~= known_digest then return {0, '', 'digest'} end
  if state then return {0, state} end
  local tenant, rows = given(ARGV[at + TENANT_NAME]), tonumber(ARGV[at + ROWS])
  local refused = tenant and refusal_of(tenant, rows)
  if refused then return refused end
  -- What an earlier life of this id, or a hand, left behind. Only if there is any: a write that
  -- frees memory would let the rest of the script pass a full Redis.
  if redis.call('EXISTS', k_rq_job(id), k_events(id), k_rq_results(id)) > 0 then
    redis.call('DEL', k_rq_job(id), k_events(id), k_rq_results(id))
  end
  local from_now = tonumber(ARGV[at + DEADLINE_MS])
  local deadline = from_now > 0 and now + from_now or 0
  -- The index first, then the list: what a list lost, the reconciler finds in the index.
  create_job(id, queue, now, {
    max_attempts = ARGV[at + MAX_ATTEMPTS], min_protocol = ARGV[at + MIN_PROTOCOL], deadline_ms = int(deadline),
    timeout_ms = ARGV[at + TIMEOUT_MS], abandon_ms = ARGV[at + ABANDON_MS], result_ttl = ARGV[at + RESULT_TTL],
    queued_ttl = ARGV[at + QUEUED_TTL], events_ttl = ARGV[at + EVENTS_TTL], failed_ttl = ARGV[at + FAILED_TTL],
    stream = ARGV[at + STREAM], marks = given(ARGV[at + MARKS]), tenant = tenant, digest = digest,
    rows = rows > 1 and rows or nil,
  })
  redis.call('ZADD', k_open(queue), int(now), id)
  note_due(id, deadline, ARGV[at + QUEUED_TTL], now)
  redis.call('HSET', k_rq_job(id), unpack(ARGV, at + RQ_FIELDS, last))
  redis.call('SADD', k_rq_queues(), k_rq_queue(queue))
  redis.call('RPUSH', k_rq_queue(queue), id)
  if tenant then tolerantly(tenant_waits, id, queue, tenant, 'RPUSH') end
  redis.call('PUBLISH', k_wake(queue), id)
  return {1, 'queued'}
end

local at = FIRST_JOB
while at <= #ARGV do
  local last = at + RQ_COUNT + tonumber(ARGV[at + RQ_COUNT])
  replies[#replies + 1] = enqueue(at, last)
  at = last + 1
end
return replies
