-- Enqueues a job anew that ended without finishing: under its id, with its payload, at the back of its queue. Any other job
-- stays as it is, so that a resend changes nothing.
-- ARGV: two prefixes, id, iso (the wall clock's time in RQ's form).
-- Returns false if there is no such job or its payload is gone; else requeued (0|1), its state now; or, if its tenant has as
--   many queued as it may: 0, its state, 'queued', limit, queued.
local id, iso = ARGV[3], ARGV[4]
local job = read_sound(id)
if not job then return false end
if OPEN[job.state] or job.state == 'finished' then return {0, job.state} end
if not is_hash(k_rq_job(id)) or redis.call('HSTRLEN', k_rq_job(id), 'data') == 0 then return false end
local refused = job.tenant and refusal_of(job.tenant, 1)  -- its rows were admitted once
if refused then return answer({0, job.state, unpack(refused, 3)}) end

-- What the control hash says of the life that ended. A suspect of a crash stays one and runs beside few rows, but its wait for
-- them begins now. Losses of workers no longer count against it. The epoch goes on, so that no attempt is named twice.
local ENDED = field_list('nonce', 'started_ms', 'first_token_ms', 'listened_ms', 'needed_rows', 'overtaken_ms',
                         'charged_nonce', 'finished_ms', 'error_code', 'message', 'result', 'losses', 'alone')
local now, queue, deadline = now_ms(), job.queue, tonumber(job.deadline_ms)
if deadline > 0 then deadline = now + deadline - tonumber(job.enqueued_ms) end  -- it counts from the enqueue
job.deadline_ms, job.owner, job.cancel_reason = int(deadline), '', ''
-- What an error of Redis cuts off before the control hash is written, has still ended, with all that it had, and a resend
-- requeues it; what one cuts off later, the reconciler finds in the index.
redis.call('ZADD', k_open(queue), int(now), id)
note_due(id, deadline, job.queued_ttl, now)
redis.call('SADD', k_rq_queues(), k_rq_queue(queue))
redis.call('HSET', k_rq_job(id), 'status', 'queued', 'enqueued_at', iso, 'worker_name', '')
redis.call('PERSIST', k_rq_job(id))
create_job(id, queue, now, job)
set_fields(id, {epoch = job.epoch, suspect_since_ms = job.suspect_since_ms and int(now)})
redis.call('PERSIST', k_job(id))
redis.call('HDEL', k_job(id), unpack(ENDED.stored))
redis.call('DEL', k_events(id), k_rq_results(id))
redis.call('HDEL', k_rq_job(id), 'started_at', 'ended_at')
for _, registry in pairs(REGISTRIES) do show(redis.call, 'ZREM', registry(queue), id) end
redis.call('RPUSH', k_rq_queue(queue), id)
if job.tenant then tolerantly(tenant_waits, id, queue, job.tenant, 'RPUSH') end
redis.call('PUBLISH', k_wake(queue), id)
return answer({1, 'queued'})
