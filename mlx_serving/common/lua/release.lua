-- Hands jobs back to their queues, uncharged: drain, no room, or too big for this worker.
-- ARGV: P R worker iso, then id epoch needed_tokens needed_rows a job (0: unknown, leave as it is).
-- Returns per job 'OK' | 'DUP' (already queued) | 'FENCED'.
local worker, iso = ARGV[3], ARGV[4]
local replies = {}

local function release(id, epoch, needed, rows)
  if not is_hash(k_job(id)) then return 'FENCED' end
  local c = redis.call('HMGET', k_job(id), 'st', 'ep', 'ow', 'q', 'ca')
  if c[1] == 'running' and c[2] == epoch and c[3] == worker then
    if c[5] ~= '' then  -- cancelled meanwhile: nobody needs to claim it again to find out
      local state = state_for(c[5])
      finalize_unowned(id, c[4], state, state == 'expired' and c[5] or 'cancelled', c[5], iso, now_ms())
    else
      if needed > 0 then redis.call('HSET', k_job(id), 'nd', int(needed)) end
      if rows > 0 then redis.call('HSET', k_job(id), 'nr', int(rows)) end
      requeue(id, c[4], worker, epoch)
    end
    return 'OK'
  end
  if c[1] == 'queued' and c[2] == epoch then return 'DUP' end
  return 'FENCED'
end

for i = 5, #ARGV, 4 do
  replies[#replies + 1] = release(ARGV[i], ARGV[i + 1], tonumber(ARGV[i + 2]), tonumber(ARGV[i + 3]))
end
return replies
