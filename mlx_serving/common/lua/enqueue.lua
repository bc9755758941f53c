-- Enqueues jobs, each once: a resend finds the job in the index of open jobs, or ended, and changes nothing. One that finds a
-- queued job that is not in the index completes it: what an error of Redis cut off was never acknowledged. One with another
-- digest is no resend.
-- ARGV: two prefixes, the wall clock's time in RQ's form, then for each job:
--   id, queue
--   max_attempts, min_protocol, deadline_ms (from now; 0: none), timeout_ms, abandon_ms (0: none), result_ttl,
--   queued_ttl, events_ttl, failed_ttl (seconds), stream (0|1)   as in its control hash
--   tenant, marks, digest             '': none
--   rows                              of the batch that it takes
--   count, and so many                fields and values in turn of RQ's hash of the job
-- Returns for each job: created (0|1), state; or, if it is refused, 0, '' and why:
--   'queued', limit, queued           its tenant has as many queued as it may
--   'running', limit, rows            it has more rows than its tenant may ever run
--   'digest'                          there is a job of its id with another payload
local FIRST_JOB = 4
-- A job's arguments, counted from its id.
local ID, QUEUE, MAX_ATTEMPTS, MIN_PROTOCOL, DEADLINE_MS, TIMEOUT_MS, ABANDON_MS, RESULT_TTL, QUEUED_TTL, EVENTS_TTL,
      FAILED_TTL, STREAM, TENANT_NAME, MARKS, DIGEST, ROWS, RQ_COUNT, RQ_FIELDS =
        0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17
local now = now_ms()
local replies = {}

local function given(argument) return argument ~= '' and argument or nil end

local BEGUN = {F.state, F.queue, F.epoch, F.digest}

-- The state of a job that was enqueued before, or nil; whether that was cut off (then it is in the index from now on); whether
-- it has another digest.
local function find(id, digest)
  local values = redis.pcall('HMGET', k_job(id), unpack(BEGUN))
  if redis.is_odd(values) then  -- a hand's
    if quarantine(k_job(id)) then redis.call('DEL', k_job(id)) end
    return nil
  end
  local state, queue, epoch, known_digest = unpack(values)
  local is_another = state and digest and known_digest and digest ~= known_digest
  if is_another or state ~= 'queued' or epoch ~= '0' or not queue then return state, false, is_another end
  -- A producer may not read the index. A full Redis refuses this, and it changes nothing then.
  return state, redis.pcall('ZADD', k_open(queue), 'NX', int(now), id) == 1, false
end

-- `at`: the job's place in ARGV; `last`: its last argument.
local function write(id, queue, tenant, at, last)
  local from_now = tonumber(ARGV[at + DEADLINE_MS])
  local deadline = from_now > 0 and now + from_now or 0
  create_job(id, queue, now, {
    max_attempts = ARGV[at + MAX_ATTEMPTS], min_protocol = ARGV[at + MIN_PROTOCOL], deadline_ms = int(deadline),
    timeout_ms = ARGV[at + TIMEOUT_MS], abandon_ms = ARGV[at + ABANDON_MS], result_ttl = ARGV[at + RESULT_TTL],
    queued_ttl = ARGV[at + QUEUED_TTL], events_ttl = ARGV[at + EVENTS_TTL], failed_ttl = ARGV[at + FAILED_TTL],
    stream = ARGV[at + STREAM], marks = given(ARGV[at + MARKS]), tenant = tenant,
    digest = given(ARGV[at + DIGEST]), rows = ARGV[at + ROWS] ~= '1' and ARGV[at + ROWS] or nil,
  })
  note_due(id, deadline, ARGV[at + QUEUED_TTL], now)
  redis.call('HSET', k_rq_job(id), unpack(ARGV, at + RQ_FIELDS, last))
  redis.call('SADD', k_rq_queues(), k_rq_queue(queue))
  -- The index last but for the list: what it holds is whole, and what a list lost, the reconciler finds in it.
  redis.call('ZADD', k_open(queue), int(now), id)
  redis.call('RPUSH', k_rq_queue(queue), id)
  if tenant then tolerantly(tenant_waits, id, queue, tenant, 'RPUSH') end
end

-- After an error in the middle (a permission that is missing): the job is refused, and nothing of it stays. `begun`: an earlier
-- call wrote something of it too, which stays as it was, to be completed.
local function take_back(id, queue, tenant, begun)
  if not begun and redis.call('EXISTS', k_job(id)) == 0 then return end  -- a full Redis refused the first write
  redis.pcall('ZREM', k_open(queue), id)
  if begun then return end
  redis.pcall('DEL', k_job(id))
  redis.pcall('DEL', k_rq_job(id))
  redis.pcall('ZREM', k_deadlines(), id)
  redis.pcall('LREM', k_rq_queue(queue), -1, id)
  if tenant then tolerantly(tenant_ends, id, queue, tenant, 1) end
end

local function enqueue(at, last)
  local id, queue = ARGV[at + ID], ARGV[at + QUEUE]
  local state, is_cut, is_another = find(id, given(ARGV[at + DIGEST]))
  if is_another then return {0, '', 'digest'} end
  if state and not is_cut then return {0, state} end
  local tenant = given(ARGV[at + TENANT_NAME])
  local refused = tenant and refusal_of(tenant, tonumber(ARGV[at + ROWS]))
  if refused then
    if is_cut then redis.call('ZREM', k_open(queue), id) end
    return refused
  end
  -- What an earlier life of this id, or a hand, left behind. Only if there is any: a write that
  -- frees memory would let the rest of the script pass a full Redis.
  if redis.call('EXISTS', k_rq_job(id), k_events(id), k_rq_results(id)) > 0 then
    redis.call('DEL', k_rq_job(id), k_events(id), k_rq_results(id))
  end
  local ok, problem = pcall(write, id, queue, tenant, at, last)
  if not ok then
    take_back(id, queue, tenant, is_cut)
    raise(problem)
  end
  redis.call('PUBLISH', k_wake(queue), id)
  return {1, 'queued'}
end

local at = FIRST_JOB
while at <= #ARGV do
  local last = at + RQ_COUNT + tonumber(ARGV[at + RQ_COUNT])
  replies[#replies + 1] = enqueue(at, last)
  at = last + 1
end
return answer(replies)
