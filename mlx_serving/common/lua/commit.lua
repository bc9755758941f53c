-- EMIT and FINISH for all rows of a flush. Per row: the attempt is the one that runs, and seq == committed + 1.
-- ARGV: two prefixes, worker, iso (the wall clock's time in RQ's form), lease_ms, rows as MessagePack. A row:
--   id, epoch, nonce                  the attempt
--   seq, form, body                   the event (`entry_of` in the prelude)
--   has_tokens                        whether the event has tokens
--   publish                           whether it goes to the job's channel too
--   state                             '': the job goes on; else it ends in this state, and the rest says how:
--   result                            result record, JSON; '': none
--   rq_result                         RQ's form of it, or of the error; '': RQ is to keep none
--   code, message                     the error; '' if it finished
-- Returns number (of the row, from 1), status, reason for each row that is not plainly OK. Status: OK with the job's cancel
-- reason; DUP (already written, word for word), FENCED (another attempt's job, or another event stands there), GAP, each with
-- that reason or ''; ERROR with Redis's own error: that row was not written, the others were.
local worker, iso, lease, packed_rows = ARGV[3], ARGV[4], tonumber(ARGV[5]), ARGV[6]
local ROW_ID, ROW_STATE = 1, 9
local now = now_ms()
local replies = {}
local OK = {'OK', ''}
local READ = attempt_fields('seq', 'cancel_reason', 'abandon_ms', 'listened_ms', 'started_ms', 'first_token_ms', 'result_ttl',
                            'events_ttl', 'failed_ttl', 'tenant')
local known = {}  -- jobs, as the rows so far left them: a flush often holds several rows of a job
local ends = {}  -- jobs that end in this flush: nothing of theirs is renewed
shared, shown = gather, gather_view
local ended = {}  -- RQ's counter of its worker → jobs of this flush

-- A resend is told from a zombie's row by the event itself: the script that ended a job that its
-- worker had lost wrote another one at that seq.
local function is_written(id, seq, entry)
  local found = redis.call('XRANGE', k_events(id), int(seq) .. '-0', int(seq) .. '-0')[1]
  if not found then return false end
  local _, fields = unpack(found)
  return table.concat(fields, '\0') == table.concat(entry, '\0')
end

-- `changes`: fields that the rows so far changed, written once a job and flush.
local function read(id)
  local job = read_fields(id, READ)
  job.changes = {}
  known[id] = job
  return job
end

-- Nobody has listened for abandon_after: the row should end.
local function note_listeners(job)
  local limit = tonumber(job.abandon_ms) or 0
  if limit == 0 then return end
  if job.receivers > 0 then job.changes.listened_ms = int(now)
  elseif job.cancel_reason == '' and now - (tonumber(job.listened_ms) or tonumber(job.started_ms) or now) > limit then
    job.cancel_reason, job.changes.cancel_reason = 'abandoned', 'abandoned'
  end
end

-- Once a flush: keep the lease, and see what stock tools did to the job.
local function renew(id, job)
  if job.renewed or ends[id] then return end
  job.renewed = true
  shared('ZADD', k_leases(job.queue), int(now + lease), id)
  if job.cancel_reason == '' then
    job.cancel_reason = stock_verdict(id)
    if job.cancel_reason ~= '' then job.changes.cancel_reason = job.cancel_reason end
  end
end

local function finish(id, job, epoch, state, result, rq_result, code, message)
  known[id] = nil
  local finished = state == 'finished'
  local shown_result = rq_result ~= '' and {type = finished and RQ_SUCCESSFUL or RQ_FAILED, value = rq_result} or nil
  finalize(id, job.queue, state, code, message, result, iso, now, worker, epoch, shown_result, job.changes, job)
  local counter = finished and 'successful_job_count' or 'failed_job_count'
  ended[counter] = (ended[counter] or 0) + 1
end

local function commit(id, epoch, nonce, seq, form, body, has_tokens, publish, state, result, rq_result, code, message)
  local job = known[id] or read(id)
  local tag = tag_of(nonce)
  local entry = entry_of(epoch, tag, form, body)
  if not runs(job, worker, epoch, nonce) then
    -- The reply to the flush that ended the job was lost.
    local ended_here = TERMINAL[job.state] and job.owner == worker and is_attempt(job, epoch, nonce)
    if ended_here and is_written(id, seq, entry) then return {'DUP', ''} end
    LOSSES.forgive(id, nonce)
    return {'FENCED', ''}
  end
  local committed = tonumber(job.seq)
  if seq <= committed then
    if is_written(id, seq, entry) then return {'DUP', job.cancel_reason or ''} end
    return {'FENCED', ''}
  end
  if seq ~= committed + 1 then return {'GAP', job.cancel_reason or ''} end
  append_event(id, seq, entry)
  job.seq, job.changes.seq = seq, int(seq)
  if has_tokens and not job.first_token_ms then job.first_token_ms, job.changes.first_token_ms = now, int(now) end
  -- Nobody can subscribe while the script runs: if the job's first event found no listener, no other will.
  if publish and job.receivers ~= 0 then job.receivers = publish_event(id, epoch, tag, seq, form, body) end
  if state ~= '' then
    finish(id, job, epoch, state, result, rq_result, code, message)
    return OK
  end
  if publish then note_listeners(job) end
  renew(id, job)
  if not job.cancel_reason or job.cancel_reason == '' then return OK end
  return {'OK', job.cancel_reason}
end

-- What a job's own keys refuse now (a foreign stream under its id), they refuse every attempt: it ends here.
local function condemn(id, message)
  if not (string.find(message, 'WRONGTYPE', 1, true) or string.find(message, 'equal or smaller', 1, true)) then return end
  bury(id, redis.call('HGET', k_job(id), F.queue) or '', iso, now)
end

-- What its rows so far left of a job, before anything else is done to it.
local function let_go(id)
  local job = known[id]
  known[id] = nil
  if job then set_fields(id, job.changes) end
end

local rows = cmsgpack.unpack(packed_rows)
for _, row in ipairs(rows) do
  if row[ROW_STATE] ~= '' then ends[row[ROW_ID]] = true end
end
for number, row in ipairs(rows) do
  local ok, reply = pcall(commit, unpack(row))
  if not ok then
    local message = type(reply) == 'table' and reply.err or tostring(reply)
    if string.find(message, '^-?READONLY') then return redis.error_reply(message) end  -- a replica: nothing was written
    pcall(let_go, row[ROW_ID])
    reply = {'ERROR', message}
    pcall(condemn, row[ROW_ID], message)
  end
  if reply ~= OK then
    local status, reason = unpack(reply)
    replies[#replies + 1] = {number, status, reason}
  end
end

for id, job in pairs(known) do set_fields(id, job.changes) end
write_gathered()

local function view_count()
  if not next(ended) or redis.call('EXISTS', k_rq_worker(worker)) == 0 then return end
  for counter, jobs in pairs(ended) do redis.call('HINCRBY', k_rq_worker(worker), counter, jobs) end
end
show(view_count)
return answer(replies)
